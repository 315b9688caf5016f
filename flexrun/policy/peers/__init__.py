"""Other engines in flexrun's terms: their traits, and their published throughputs forecast by flexrun's costs."""
