"""How fast this machine runs the models, beside the plain formulation and the machine's own limits."""
