import logging

# bitsandbytes warns, as it is imported, of an optional package of kernels that nobody needs: to who reads the log, an error
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
