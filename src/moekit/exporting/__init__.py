"""Write models in packed forms that engines read: one file a format."""
