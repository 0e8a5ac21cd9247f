"""What clients and the server say to each other, read and written by hand."""
