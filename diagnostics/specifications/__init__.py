"""Does a claim depend on the choices that its authors had to make?"""
