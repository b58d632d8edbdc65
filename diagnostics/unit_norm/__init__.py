"""What if tokens lost their norm?"""
