"""What is not needed to answer a question about a picture, and is imported only where an option asks for it."""
