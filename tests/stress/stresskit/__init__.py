"""What the stress test is made of: adapter contents, what a name may mean, random traffic, and who tells the truth."""
