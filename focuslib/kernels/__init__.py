"""Pure tensor maths: no model, no state."""
