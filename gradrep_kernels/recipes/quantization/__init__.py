"""What the networks of a run keep of their accuracy in few bits."""
