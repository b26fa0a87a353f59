"""One byte budget shared by dropping, merging, narrowing and rounding: menus, costs, and the knapsack between them."""
