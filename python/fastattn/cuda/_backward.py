launch = None
