"""Real programs to run and to copy: questions answered from documents, handwritten digits read."""
