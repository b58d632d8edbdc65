"""What does removing a direction from an activation do, and which score of the direction predicts it?"""
