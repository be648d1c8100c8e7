"""What every depth of a model is worth, from one short training of several depths at once."""
