"""What a worker measures of itself: how long its device, its host and its links take, for the search for slow ranks."""
