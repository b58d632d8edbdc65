"""How much does the model change when an activation moves by a given distance?"""
