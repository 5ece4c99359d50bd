"""What dite knows of models: finding blocks and linears, loading, and the built-in ones."""
