"""Does a claim survive the choices its authors had to make?"""
