"""What does removing each latent of a whole dictionary do, and is it more than its dose?"""
