"""Speed and memory of DCFT beside what a user would pick instead; see README.md in this folder."""
