"""What training will need and how fast it will be, found out without running it."""
