"""Does the model read an activation's direction or its norm?"""
