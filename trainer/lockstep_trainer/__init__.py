"""Agent, leader and workers: what runs in each pod."""
