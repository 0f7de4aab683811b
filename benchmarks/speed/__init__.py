"""Time and memory of DCFT and its peers, each checked before it is timed."""
