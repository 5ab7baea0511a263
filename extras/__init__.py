"""What is not needed to answer a question about a picture, a file each, imported only where an option asks for it.

(But for `command_line.py`, which knows the options.)
"""
