"""The bundled model: its training data, training, score and ablations."""
