"""Processes of one job: ranks, who has come, who failed, who is told to stop."""
