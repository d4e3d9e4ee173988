"""How much each layer suffers in each format; the torch-free tables are importable without torch."""
