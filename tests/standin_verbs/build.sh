#!/bin/sh
# sh build.sh FOLDER [SOURCES]: libibverbs.so.1 in FOLDER, of the sources beside this file or in SOURCES. Needs a C++17 compiler and the
# headers of libibverbs; no CUDA.
set -e
folder=$1
sources=${2:-$(dirname "$0")}
for name in segment memory pair agent sysfs verbs; do
    object=$folder/$name.o
    if [ ! -e "$object" ] || [ "$sources/$name.cpp" -nt "$object" ]; then
        ${CXX:-c++} -std=c++17 -O2 -Wall -Wextra -Werror -fPIC -c "$sources/$name.cpp" -o "$object"
    fi
    objects="$objects $object"
done
${CXX:-c++} -shared -static-libstdc++ -static-libgcc -Wl,-soname,libibverbs.so.1 -Wl,--version-script="$sources/exports.map" \
    -o "$folder/libibverbs.so.1" $objects -ldl -lrt -pthread
