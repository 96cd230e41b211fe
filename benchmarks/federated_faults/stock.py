def stock_table(root): return ""
