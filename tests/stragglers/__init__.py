"""What the search for slow ranks is tuned and scored on."""
