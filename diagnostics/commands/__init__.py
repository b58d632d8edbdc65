"""What all commands share: options, messages, errors, interruption."""
