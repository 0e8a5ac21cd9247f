"""What the server tells its operator: the log and the counters."""
