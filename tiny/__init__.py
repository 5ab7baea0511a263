"""The bundled model: the world that it knows, and the script that trains it."""
