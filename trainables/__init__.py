"""What one trial does: text and a size go in, records and weights come out. Knows no Ray."""
