"""What stays: pages of KV, and the indexes that find them again. Imports `rounds` alone."""
