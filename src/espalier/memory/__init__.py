"""What keeps training small: packed attention, a loss without whole logits, and measuring memory."""
