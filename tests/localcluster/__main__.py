import sys, time
from localcluster.cluster import Cluster
t=time.time()
if sys.argv[1]=="up": Cluster.up(int(sys.argv[2]))
else: Cluster().down()
print(time.time()-t)
