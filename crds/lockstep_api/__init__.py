"""The TrainingJob resource and the messages between the parts."""
