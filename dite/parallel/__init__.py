"""Several devices, one picture: tokens, heads, layers or guidance branches shared out, and what they exchange compressed."""
