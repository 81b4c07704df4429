"""The commands, by subject. Each is thin: it reads its options, calls, and prints."""
