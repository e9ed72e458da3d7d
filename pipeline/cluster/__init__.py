"""THE ONLY ROOM THAT IMPORTS RAY: how the work of the other rooms is spread over machines."""
