"""HTTP below the endpoints: calls, who may make them, and connections."""
