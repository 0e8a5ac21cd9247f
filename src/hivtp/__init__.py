"""hivtp: export and serve LLaVA-class models with HIVTP visual token pruning inside the graph."""
