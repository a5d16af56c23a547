"""What a model chose: as rows and as pictures."""
