"""What is known of machines before they are there: chips, topologies, and what a compiled program will do on them."""
