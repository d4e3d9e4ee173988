"""How much each layer suffers in each format; tables are imported without torch."""
