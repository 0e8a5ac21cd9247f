"""Other systems that run hivtp, or that hivtp runs in; nothing here is imported before it is asked for."""
