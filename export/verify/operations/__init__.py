"""Every operation of a written graph, compared with transformers on the same inputs."""
