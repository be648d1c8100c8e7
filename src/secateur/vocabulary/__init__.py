"""Which tokens a vocabulary needs for the user's texts, and the model without the others."""
