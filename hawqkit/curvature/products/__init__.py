"""How products with the Hessian are made: one file a back-end."""
