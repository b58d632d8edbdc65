"""Clean and corrupt prompts of equal length with a right and a wrong answer: made from templates, or read."""
