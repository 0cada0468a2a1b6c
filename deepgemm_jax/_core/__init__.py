"""How an op is declared once and becomes a JAX primitive. Knows no family of ops."""
